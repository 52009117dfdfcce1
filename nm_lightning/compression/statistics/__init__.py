"""What calibration images say: the images and how ranks share them, two networks side by side, patches, joins."""
