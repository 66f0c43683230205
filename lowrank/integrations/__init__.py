"""Parts that other libraries call. Each file needs its library; none is imported with the package."""
