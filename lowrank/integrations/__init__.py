"""Parts that other libraries call; each file needs its library, and nothing here is imported with the package."""
