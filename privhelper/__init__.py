"""The root helper: standard library only, a closed table of requests, readable in one sitting."""
