"""Recipe: the small model trained from nothing, stage by stage."""
