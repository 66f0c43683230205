"""Data classes of this library as JSON. Files on disk are `lowrank.files`."""
