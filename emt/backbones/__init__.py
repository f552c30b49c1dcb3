"""Networks that motion is transferred on, one folder each."""
