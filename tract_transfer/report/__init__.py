"""Reports of finished runs: tables, statistics, figures, and the pages made of them."""
