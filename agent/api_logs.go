package agent

import (
	"errors"
	"io"
	"io/fs"
	"net/http"
	"time"

	"github.com/google/uuid"
)

// getScriptLog shows the whole log file of a script, of which a server may have taken a part only.
func (a *api) getScriptLog(w http.ResponseWriter, r *http.Request) {
	source, err := uuid.Parse(r.PathValue("source"))
	if err != nil {
		writeError(w, http.StatusBadRequest, "The log source is no UUID.", err)
		return
	}
	file, err := a.scriptLog(source)
	var info fs.FileInfo
	if err == nil {
		defer file.Close()
		info, err = file.Stat()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		writeError(w, http.StatusNotFound, "No script with that log source has run here.", nil)
		return
	case err == nil && !info.Mode().IsRegular():
		err = errors.New("it is no regular file")
	}
	if err != nil {
		writeError(w, http.StatusInternalServerError, "The script's log file cannot be read.", err)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	// As long as it is now: a script that goes on printing must not keep the answer from ending.
	if err := a.mask.Copy(unhurried{w, http.NewResponseController(w)}, io.LimitReader(file, info.Size())); err != nil {
		panic(http.ErrAbortHandler) // an answer that ends early must not look whole
	}
}

// unhurried is an answer that may take long, as long as some of it is taken now and then.
type unhurried struct {
	http.ResponseWriter
	deadlines *http.ResponseController
}

func (u unhurried) Write(p []byte) (int, error) {
	if err := u.deadlines.SetWriteDeadline(time.Now().Add(apiTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return 0, err
	}
	return u.ResponseWriter.Write(p)
}
