"""Says what a run is, what it cost and where its result is: lines on the screen, run.json and report.html."""
