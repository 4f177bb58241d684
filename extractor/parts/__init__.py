"""Parts of a run: a job array fills a store together."""
