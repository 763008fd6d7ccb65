"""Quality measures: FSC, map against map, pose errors, views. numpy in, numpy out; no files, no ranks."""
