"""The whole recipe on one data-centre GPU, in minutes: everything a step needs lies on the GPU."""
