"""What the site is made of besides its pages: fields, results, plots, equations, docstrings."""
