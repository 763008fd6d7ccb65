"""RELION STAR files of particles: text, columns, reading and writing."""
