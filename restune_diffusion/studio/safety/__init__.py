"""Safety of the page: who may use it, which routes exist, and which files a request may name."""
