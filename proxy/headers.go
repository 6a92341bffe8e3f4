package proxy

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/cache"
	"tidemark/proxy/oci"
	"tidemark/proxy/upstream"
)

// describeContent sets the headers of content. A size of -1 is left out.
func describeContent(head http.Header, dgst digest.Digest, mediaType string, size int64) {
	d := string(dgst)
	head["Docker-Content-Digest"] = []string{d}
	head["Etag"] = []string{`"` + d + `"`}
	head["Content-Type"] = []string{mediaType}
	if size >= 0 {
		head["Content-Length"] = []string{strconv.FormatInt(size, 10)}
	}
}

// matches tells whether the client has the content of dgst already (RFC 9110,
// section 13.1.2).
func matches(r *http.Request, dgst digest.Digest) bool {
	for tag := range strings.SplitSeq(r.Header.Get("If-None-Match"), ",") {
		tag = strings.TrimPrefix(strings.TrimSpace(tag), "W/")
		if tag == `"`+string(dgst)+`"` {
			return true
		}
	}
	return false
}

// notModified answers 304 if the client has the content already.
func notModified(w http.ResponseWriter, r *http.Request, dgst digest.Digest) bool {
	if !matches(r, dgst) {
		return false
	}
	w.Header().Del("Content-Length")
	w.WriteHeader(http.StatusNotModified)
	return true
}

// The values of Cache-Status (RFC 9211).
var (
	statusOf = map[cache.Outcome][]string{
		cache.Hit:  {"tidemark; hit"},
		cache.Fill: {"tidemark; fwd=miss; stored"},
		cache.Join: {"tidemark; fwd=miss; collapsed"},
		cache.Pass: {"tidemark; fwd=miss; detail=uncached"},
	}
	asked     = []string{"tidemark; fwd=miss"}
	confirmed = []string{"tidemark; fwd=stale; fwd-status=200"}
)

func contentStatus(o cache.Outcome) []string { return statusOf[o] }

// tagStatus is about the tag: whether upstream was asked what it means.
func tagStatus(ans audit.Answer, o cache.Outcome) []string {
	switch {
	case ans.Stale != nil:
		return staleStatus(ans.Stale)
	case ans.New:
		return statusOf[cache.Fill]
	case ans.Asked && o == cache.Hit:
		return confirmed
	}
	return statusOf[o]
}

// heldHeader tells what is not served yet, nil when the head is.
func heldHeader(ans audit.Answer) []string {
	held, until, why := ans.Withheld()
	if held == "" {
		return nil
	}
	v := string(held)
	if until != nil {
		v += "; until=" + until.Format(time.RFC3339)
	}
	return []string{v + "; reason=" + why}
}

// staleStatus says why an answer could not be confirmed.
func staleStatus(cause error) []string {
	var ue *upstream.Error
	switch {
	case errors.Is(cause, audit.ErrLedger):
		return []string{"tidemark; fwd=stale; detail=ledger-unwritable"}
	case errors.As(cause, &ue) && ue.Status != 0:
		return []string{fmt.Sprintf("tidemark; fwd=stale; fwd-status=%d", ue.Status)}
	case errors.As(cause, &ue) && ue.Nonsense:
		return []string{"tidemark; fwd=stale; detail=invalid-answer"}
	}
	return []string{"tidemark; fwd=stale; detail=no-answer"}
}

// A byteRange is a single range of bytes as a client wrote it. Of first and
// last at most one is -1: no last means to the end, no first the last bytes.
type byteRange struct{ first, last int64 }

// parseRange reads the Range header (RFC 9110, section 14.2). Several ranges,
// other units and an If-Range that does not match are answered with the whole,
// as the RFC allows; what is malformed is refused.
func parseRange(r *http.Request) (*byteRange, error) {
	v := r.Header.Get("Range")
	if v == "" {
		return nil, nil
	}
	unit, spec, ok := strings.Cut(v, "=")
	if !ok {
		return nil, badRange(v)
	}
	if unit != "bytes" || strings.Contains(spec, ",") {
		return nil, nil
	}
	if ir := r.Header.Get("If-Range"); ir != "" && !strings.HasSuffix(r.URL.Path, "/"+strings.Trim(ir, `"`)) {
		return nil, nil
	}
	from, to, ok := strings.Cut(strings.TrimSpace(spec), "-")
	if !ok || from == "" && to == "" {
		return nil, badRange(v)
	}
	b := &byteRange{-1, -1}
	for _, side := range []struct {
		text string
		n    *int64
	}{{from, &b.first}, {to, &b.last}} {
		if side.text == "" {
			continue
		}
		n, err := strconv.ParseUint(side.text, 10, 63)
		if err != nil {
			return nil, badRange(v)
		}
		*side.n = int64(n)
	}
	if b.first >= 0 && b.last >= 0 && b.last < b.first { // of no content; the conformance suite of the specification has it so
		return nil, &oci.Error{Status: http.StatusRequestedRangeNotSatisfiable, Code: oci.Unsupported, Message: fmt.Sprintf("Range %.100q ends before it begins", v)}
	}
	return b, nil
}

func badRange(v string) error {
	return &oci.Error{Status: http.StatusBadRequest, Code: oci.Unsupported, Message: fmt.Sprintf("Range %.100q is malformed: want bytes=first-last", v)}
}

// of returns the offset and length of the range in content of size bytes, and
// whether there is any.
func (b *byteRange) of(size int64) (off, n int64, ok bool) {
	if b.first < 0 { // the last b.last bytes
		n = min(b.last, size)
		return size - n, n, n > 0
	}
	if b.first >= size {
		return 0, 0, false
	}
	last := size - 1
	if b.last >= 0 {
		last = min(last, b.last)
	}
	return b.first, last - b.first + 1, true
}

func contentRange(off, n, size int64) string {
	return fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, size)
}
