"""What wrapping, loading and importing share: checks, and the surgery itself."""
