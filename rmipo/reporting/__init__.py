"""Tables and figures of the paper, rebuilt from result files and run folders with the paper's numbers beside ours."""
