"""What trained the shipped model from nothing, stage by stage."""
