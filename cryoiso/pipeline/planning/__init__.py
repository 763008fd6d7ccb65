"""Run time, memory and disk usage of a job, before it runs and while it runs."""
