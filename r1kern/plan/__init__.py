"""`r1kern plan`: what a run needs and how long a step is modelled to take, without a GPU."""
