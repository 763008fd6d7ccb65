"""The ideas of the papers, each a method on top of refinement and training."""
