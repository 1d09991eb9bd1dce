"""Other people's trainers. Nothing here is imported by `import peftkit`; each module needs the package it is named after."""
