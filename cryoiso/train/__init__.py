"""Training of any network: which images make a step, the loop with its watchdogs, and what is kept to go on later."""
