"""What is known of other people's models: their projections, layouts, storage and names."""
