package tailnet

const childVar = "BERTH_TAILNET_TEST_CHILD"

func child() int { return 1 }
