"""Records of a run folder: its layout, journal, manifest, hashes, lock and seal."""
