"""From a job file to a result: the order of stages, the run folder, what makes a run resumable and traceable."""
