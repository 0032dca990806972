"""The page that shows what the margin does to pairs: `rmipo.look` scores them and writes it (docs/LOOK.md)."""
