"""Which row counts give a row the same bits, and how long calls take; kept between starts."""
