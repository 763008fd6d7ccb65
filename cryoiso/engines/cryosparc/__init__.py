"""cryoSPARC as an engine, through the published cryosparc-tools, see ``engine``. Never run against a real cryoSPARC."""
