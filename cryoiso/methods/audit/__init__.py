"""Controls of a finished refinement: what is changed, what is measured, and the verdicts; arrays in, numbers out."""
