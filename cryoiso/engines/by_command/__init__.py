"""Any refinement program as an engine: started by a command line of the user's, see ``engine``."""
