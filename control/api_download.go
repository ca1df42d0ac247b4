package control

import (
	"fmt"
	"net/http"
	"slices"

	"github.com/berthd/berth/wire"
)

// platforms are those that agents are built for, as os/arch.
var platforms = []string{"linux/amd64", "linux/arm64", "linux/armv7", "darwin/amd64", "darwin/arm64", "windows/amd64", "windows/arm64"}

// getInitScript would bootstrap an agent by what getBinary serves.
func getInitScript(w http.ResponseWriter, r *http.Request) {
	platform := r.PathValue("os") + "/" + r.PathValue("arch")
	if !slices.Contains(platforms, platform) {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Unknown os/arch: " + short(platform)})
		return
	}
	noBinary(w, "script for "+platform)
}

func getBinary(w http.ResponseWriter, r *http.Request) { noBinary(w, short(r.PathValue("file"))) }

func noBinary(w http.ResponseWriter, what string) {
	writeError(w, &wire.Error{StatusCode: http.StatusNotFound, Message: "This control server holds no agent programs.",
		Detail: fmt.Sprintf("Install berthd in the workspace by other means; there is no %s here.", what)})
}
