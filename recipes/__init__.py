"""What trains the small model from nothing, stage by stage."""
