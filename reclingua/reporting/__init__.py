"""The parts of a run's report: what a test leaves for it, intervals, pictures, sections, the page."""
