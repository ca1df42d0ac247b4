package control

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/berthd/berth/control/openapi"
	"github.com/berthd/berth/wire"
)

// platforms are those that stock servers have agents for, as os/arch.
var platforms = []string{"linux/amd64", "linux/arm64", "linux/armv7", "darwin/amd64", "darwin/arm64", "windows/amd64", "windows/arm64"}

// archiveMedia is the type of an agent program.
const archiveMedia = "application/gzip"

// getInitScript would start a stock agent by what stock servers have at /bin/.
func getInitScript(w http.ResponseWriter, r *http.Request) {
	platform := r.PathValue("os") + "/" + r.PathValue("arch")
	if !slices.Contains(platforms, platform) {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Unknown os/arch: " + short(platform)})
		return
	}
	writeError(w, &wire.Error{StatusCode: http.StatusNotFound, Message: "This control server starts no agents of Coder.",
		Detail: "Install berthd in the workspace, by the script at /install.sh for one."})
}

// getProgram hands out what installs an agent, to anybody: there is no secret in it.
func (s *Server) getProgram(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("file")
	p := s.programs.Load()
	if p == nil {
		noPrograms(w)
		return
	}
	switch name {
	case versionFile:
		p.version.serve(w, r, openapi.Text)
		return
	case sumsFile:
		p.sums.serve(w, r, openapi.Text)
		return
	}
	a, ok := p.archives[name]
	if !ok {
		writeError(w, &wire.Error{StatusCode: http.StatusNotFound, Message: fmt.Sprintf("There is no agent program %s here.", short(name)),
			Detail: "/bin/SHA256SUMS lists those that there are."})
		return
	}
	f, err := a.open()
	if err != nil {
		s.log.Error("cannot hand out an agent program", "error", err)
		writeError(w, &wire.Error{StatusCode: http.StatusServiceUnavailable, Message: "This agent program cannot be handed out just now.",
			Detail: "It was changed or removed; the server's log has more."})
		return
	}
	defer f.Close()
	serveContent(w, r, archiveMedia, a.sum, a.info.ModTime(), f)
}

func (s *Server) getInstallScript(w http.ResponseWriter, r *http.Request) {
	p := s.programs.Load()
	if p == nil {
		noPrograms(w)
		return
	}
	p.script.serve(w, r, openapi.Text)
}

func noPrograms(w http.ResponseWriter) {
	writeError(w, &wire.Error{StatusCode: http.StatusNotFound, Message: "This control server holds no agent programs.",
		Detail: "Its operator can give it some by berth serve --agent-binaries DIR; or install berthd in the workspace by other means."})
}

func (t text) serve(w http.ResponseWriter, r *http.Request, media string) {
	serveContent(w, r, media, t.sum, t.made, bytes.NewReader(t.body))
}

// serveContent answers with content, whole or in ranges. Caches may keep it and have to ask each time whether it is
// still this: the names stay when a server is upgraded.
func serveContent(w http.ResponseWriter, r *http.Request, media, sum string, changed time.Time, content io.ReadSeeker) {
	h := w.Header()
	h.Set("Content-Type", media)
	h.Set("Cache-Control", "public, no-cache")
	h.Set("ETag", `"`+sum+`"`)
	http.ServeContent(patientWriter{w}, r, "", changed, content)
}

// patientWriter gives a caller time for each part of a long answer.
type patientWriter struct{ http.ResponseWriter }

func (w patientWriter) Write(part []byte) (int, error) {
	extendWrite(w.ResponseWriter)
	return w.ResponseWriter.Write(part)
}
