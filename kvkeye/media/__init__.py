"""Pictures and clips: reading, limits, choice of frames, sizes, patches. See README.md in this folder."""
