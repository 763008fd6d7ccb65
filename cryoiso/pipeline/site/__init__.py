"""The machine: processors, memory, GPUs, file systems, and what is wrong with them for a job."""
