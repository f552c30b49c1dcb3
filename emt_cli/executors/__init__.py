"""How the workers of a run are started: on this device, later on many."""
