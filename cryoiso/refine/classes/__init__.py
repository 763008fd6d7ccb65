"""3D classification: several references, the posterior over classes and poses, the loop over iterations."""
