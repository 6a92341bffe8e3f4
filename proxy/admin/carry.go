package admin

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// A Carrier has images here ahead of time, and takes them to places without network.
type Carrier interface {
	// Warm has the images of refs here, and tells how far it is.
	Warm(ctx context.Context, q WarmRequest, tell func(WarmProgress)) (WarmReport, error)

	// Export writes a bundle. If it cannot, and says so before anything is written,
	// the client gets that error. Import takes one in.
	Export(ctx context.Context, w io.Writer, q ExportRequest) error
	Import(ctx context.Context, r io.Reader, trust string) (ImportReport, error)
}

// WarmRequest is the body of POST /api/v1/warm.
type WarmRequest struct {
	Refs      []string `json:"refs"`      // with a tag, a digest or both, of which the digest counts
	Platforms []string `json:"platforms"` // none for all
}

// WarmProgress is a line of its answer, about one ref. The last one of a ref says that
// it is done, or has an error.
type WarmProgress struct {
	Ref    string        `json:"ref"`
	Digest digest.Digest `json:"digest,omitempty"`
	Have   int64         `json:"have"`  // bytes of what was missing
	Total  int64         `json:"total"` // as far as is known

	Done      bool       `json:"done,omitempty"`
	Filled    int        `json:"filled,omitempty"` // pieces of content that were not here before
	Bytes     int64      `json:"bytes,omitempty"`  // of them
	Platforms []Platform `json:"platforms,omitempty"`
	Error     string     `json:"error,omitempty"`
}

// WarmReport is the last line.
type WarmReport struct {
	Done     bool     `json:"done"`
	Complete bool     `json:"complete"` // everything that was asked for is here
	Filled   int      `json:"filled"`
	Bytes    int64    `json:"bytes"`
	Failed   []Failed `json:"failed"`
}

// Failed is a ref that is not here whole, and why.
type Failed struct {
	Ref   string `json:"ref"`
	Error string `json:"error"`
}

func (h *Handler) warm(r *http.Request, tell func(any)) (any, error) {
	var q WarmRequest
	if err := body(r, &q); err != nil {
		return nil, err
	}
	if len(q.Refs) == 0 {
		return nil, badRequest("refs: there are none")
	}
	if err := h.platforms(&q.Platforms); err != nil {
		return nil, err
	}
	report, err := h.o.Carrier.Warm(r.Context(), q, func(p WarmProgress) { tell(p) })
	report.Done, report.Failed = true, nonNil(report.Failed)
	return report, err
}

// platforms checks a list of platforms, and makes none of an empty one.
func (h *Handler) platforms(list *[]string) error {
	if len(*list) == 0 {
		*list = nil
	}
	if err := h.o.CheckPlatforms(*list); err != nil {
		return badRequest("platforms: %v", err)
	}
	return nil
}

// ExportRequest is the body of POST /api/v1/export. The answer is a tar.
type ExportRequest struct {
	Refs      []string     `json:"refs"`
	Platforms []string     `json:"platforms"` // of indexes; none for all
	Since     *ExportSince `json:"since,omitempty"`

	Parsed []audit.Ref `json:"-"` // Refs, each once
}

// ExportSince makes a delta of it.
type ExportSince struct {
	Bundle  digest.Digest   `json:"bundle,omitempty"` // that the receiver has; without it only
	LogSize int64           `json:"log_size"`         // how many entries the log had counts
	Refs    []string        `json:"refs"`             // in the bundle
	Content []digest.Digest `json:"content"`          // in the bundle, and what that left out

	Parsed []audit.Ref `json:"-"`
}

// maxBase bounds the body of an export in bytes: a base can list much.
const maxBase = 64 << 20

func (h *Handler) export(w http.ResponseWriter, r *http.Request) {
	q, err := h.exportRequest(w, r)
	if err != nil {
		writeError(w, err)
		return
	}
	out := &tarAnswer{w: w}
	err = h.o.Carrier.Export(r.Context(), out, q)
	switch {
	case err == nil:
	case !out.begun:
		writeError(w, err)
	default:
		h.o.Failed(r, err)
		panic(http.ErrAbortHandler) // the client must not take it for a whole one
	}
}

func (h *Handler) exportRequest(w http.ResponseWriter, r *http.Request) (q ExportRequest, err error) {
	if !isContent(r, "application/json") {
		return q, errNotJSON
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxBase)
	if err := body(r, &q); err != nil {
		return q, err
	}
	if len(q.Refs) == 0 {
		return q, badRequest("refs: there are none")
	}
	if q.Parsed, err = parseRefs("refs", q.Refs); err != nil {
		return q, err
	}
	if s := q.Since; s != nil {
		if s.LogSize < 0 {
			return q, badRequest("since: log_size is below zero")
		}
		if s.Parsed, err = parseRefs("since.refs", s.Refs); err != nil {
			return q, err
		}
	}
	return q, h.platforms(&q.Platforms)
}

// parseRefs reads refs, and returns each once.
func parseRefs(key string, texts []string) ([]audit.Ref, error) {
	var out []audit.Ref
	seen := make(map[audit.Ref]bool)
	for _, text := range texts {
		ref, err := audit.ParseRef(text)
		if err != nil {
			return nil, badRequest("%s: %v", key, err)
		}
		if !seen[ref] {
			out = append(out, ref)
		}
		seen[ref] = true
	}
	return out, nil
}

// A tarAnswer begins an answer with its first byte.
type tarAnswer struct {
	w     http.ResponseWriter
	begun bool
}

func (t *tarAnswer) Write(p []byte) (int, error) {
	if !t.begun {
		t.begun = true
		t.w.Header().Set("Content-Type", "application/x-tar")
	}
	return t.w.Write(p)
}

// ImportReport is the answer of POST /api/v1/import, whose body is a bundle. trust is
// the verifier key that must have signed it.
type ImportReport struct {
	Bundle  digest.Digest `json:"bundle"`
	Origin  string        `json:"origin"`
	LogSize int64         `json:"log_size"`
	Already bool          `json:"already"` // it had been imported before
	Refs    []ImportedRef `json:"refs"`
}

// ImportedRef is a ref of a bundle.
type ImportedRef struct {
	Ref    string        `json:"ref"`
	Digest digest.Digest `json:"digest"`
	Became string        `json:"became"` // new, moved, same, held or older
}

func (h *Handler) imports(w http.ResponseWriter, r *http.Request) {
	if !isContent(r, "application/x-tar") {
		writeError(w, &Error{http.StatusUnsupportedMediaType, "not_tar", "this call needs Content-Type: application/x-tar"})
		return
	}
	api(func(r *http.Request) (any, error) {
		report, err := h.o.Carrier.Import(r.Context(), r.Body, r.URL.Query().Get("trust"))
		report.Refs = nonNil(report.Refs)
		return report, err
	}, "trust")(w, r)
}

// Past is the answer of GET /api/v1/tags/asof: what a ref meant at a time, or right
// after an entry.
type Past struct {
	Ref    string        `json:"ref"`
	Digest digest.Digest `json:"digest"`
	Basis  string        `json:"basis"`
	Source string        `json:"source,omitempty"` // whose word it is, unless it was observed
	Index  int64         `json:"index"`            // of the entry that says so
	From   time.Time     `json:"valid_from"`
	Until  *time.Time    `json:"valid_until,omitempty"`
	Gap    string        `json:"gap,omitempty"` // why it may have been another all the same
}

func (h *Handler) asof(r *http.Request) (any, error) {
	q := r.URL.Query()
	ref, err := parseRef(q)
	if err != nil {
		return nil, err
	}
	m, err := h.moment(q)
	if err != nil {
		return nil, err
	}
	c, err := h.o.Chronicle(r.Context(), ref)
	if err != nil {
		return nil, err
	}
	c.GapAfter = h.o.Ledger.Policy().GapAfter()
	then, err := c.AsOf(m, time.Now())
	var past *audit.PastError
	if errors.As(err, &past) && past.Earliest != nil {
		return nil, &Error{http.StatusNotFound, "not_found", err.Error() + "; something is known from " + past.Earliest.Format(time.RFC3339) + " on"}
	}
	if err != nil {
		return nil, err
	}
	return Past{ref.String(), then.Digest, then.Basis, then.Source, then.Index, then.From, then.Until, then.Gap}, nil
}

func (h *Handler) moment(q url.Values) (m audit.Moment, err error) {
	asof, at := q.Get("asof"), q.Get("at")
	switch {
	case asof != "" && at != "", asof == "" && at == "":
		return m, badRequest("asof, a date or a time, or at, an index, is needed")
	case at != "":
		n, err := strconv.ParseInt(at, 10, 64)
		if err != nil || n < 0 {
			return m, badRequest("at %.50q is not an index", at)
		}
		return audit.AtIndex(n), nil
	}
	t, err := h.o.ParseTime(asof)
	if err != nil {
		return m, badRequest("asof: %v", err)
	}
	return audit.AtTime(t), nil
}

// BackfillReport is the answer of POST /api/v1/tags/backfill {ref}: what upstream says
// of its own past.
type BackfillReport struct {
	Ref     string  `json:"ref"`
	Source  string  `json:"source"` // which of upstream's lists
	Added   int     `json:"added"`  // claims that were not known
	History []Claim `json:"history"`
}

// Claim is a time in which a ref meant a digest by the word of somebody else.
type Claim struct {
	Digest    digest.Digest `json:"digest"`
	FirstSeen time.Time     `json:"first_seen"` // by that word
	Ended     *time.Time    `json:"ended,omitempty"`
}

func (h *Handler) backfill(r *http.Request) (any, error) {
	var in struct {
		Ref string `json:"ref"`
	}
	if err := body(r, &in); err != nil {
		return nil, err
	}
	ref, err := audit.ParseRef(in.Ref)
	if err != nil {
		return nil, badRequest("ref: %v", err)
	}
	report, err := h.o.Backfill(r.Context(), ref)
	report.History = nonNil(report.History)
	return report, err
}
