package front_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"tidemark/proxy/front"
)

// A handler that panics is an error of ours, and its line is closed.
func TestPanicIsAnError(t *testing.T) {
	s := run(t, front.Options{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("nil map") })})
	if _, err := client(t).Get("http://" + s.addr); err == nil {
		t.Error("the client got an answer")
	}
	next(t, s.lines, "line")
	if got := next(t, s.log, "log"); !strings.Contains(got, `"error"`) {
		t.Errorf("panic is logged as %.200s", got)
	}
}

// The line has the status of the answer, not of a hint before it.
func TestLineHasTheFinalStatus(t *testing.T) {
	s := run(t, front.Options{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(http.StatusNotFound)
	})})
	status, _ := get(t, client(t), "http://"+s.addr)
	if l := next(t, s.lines, "line"); l.Status != status || status != http.StatusNotFound {
		t.Errorf("line has status %d, the client %d", l.Status, status)
	}
}

// What a handler writes in answer to HEAD is not sent, and not counted.
func TestHeadSendsNoBytes(t *testing.T) {
	s := run(t, front.Options{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, "12345")
	})})
	resp, err := client(t).Head("http://" + s.addr)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if l := next(t, s.lines, "line"); l.Bytes != 0 {
		t.Errorf("line counts %d bytes of a HEAD", l.Bytes)
	}
}
