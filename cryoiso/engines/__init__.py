"""Refinement programs behind one protocol (core.protocols.Engine)."""
