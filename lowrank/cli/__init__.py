"""The commands of `lowrank`: a file for each. Users of Python import none of it."""
