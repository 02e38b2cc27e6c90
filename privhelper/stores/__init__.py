"""The two places where block devices live: device-mapper thin provisioning, and reflinked files on loop devices."""
