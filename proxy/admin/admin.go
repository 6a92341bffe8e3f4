// Package admin is what operators and their scripts see: health, metrics, the
// JSON API, and the log in the form in which anyone can check it.
package admin

import (
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/diff"
	"tidemark/cache"
)

// Views reads what the ledger has recorded.
type Views interface {
	// Tags and Events return what the query selects, in its order.
	Tags(context.Context, audit.TagQuery) ([]audit.Tag, error)
	Events(context.Context, audit.EventQuery) ([]audit.Entry, error)
}

// Entries reads the log as it was sealed.
type Entries interface {
	// Leaves returns n leaves from start on, or fs.ErrNotExist.
	Leaves(ctx context.Context, start, n int64) ([][]byte, error)
	// Tree returns the committed tree, which may be ahead of the signed one.
	Tree(context.Context) (tlog.Tree, error)
	tlog.HashReader
}

// Contents looks at what digests stand for, here and upstream.
type Contents interface {
	// Complete makes sure that the bytes of a digest of a ref are here.
	Complete(ctx context.Context, ref audit.Ref, d digest.Digest) error
	// Diff compares two digests of a ref.
	Diff(ctx context.Context, ref audit.Ref, old, new digest.Digest) (*diff.Diff, error)
}

// Options configure a Handler. All but Token is required.
type Options struct {
	Version  string
	Started  time.Time
	Origin   string // name of the log
	Token    string // "" lets everyone in: only on loopback
	Cache    *cache.Cache
	Views    Views
	Entries  Entries
	Ledger   *audit.Ledger
	Contents Contents
	Signer   *audit.Signer
	Metrics  *Metrics
	Events   *Events

	// History is what a ref meant, newest first. RefOf is a ref
	// that meant a digest. Exposures is who resolved or fetched one; those that
	// were noted are written down by FlushExposures. Conditions are the troubles
	// of upstreams, newest first.
	History        func(context.Context, audit.Ref, audit.HistoryQuery) ([]audit.Stint, error)
	RefOf          func(context.Context, digest.Digest) (audit.Ref, error)
	Exposures      func(context.Context, digest.Digest) ([]audit.Exposure, error)
	FlushExposures func(context.Context)
	Conditions     func(ctx context.Context, limit int) ([]audit.Condition, error)

	// Claims are what a ref meant by the word of others, and Chronicle all that is
	// known of it. Backfill asks upstream for its own past of it.
	Claims    func(context.Context, audit.Ref) ([]audit.Claim, error)
	Chronicle func(context.Context, audit.Ref) (audit.Chronicle, error)
	Backfill  func(context.Context, audit.Ref) (BackfillReport, error)

	// EachTag yields the tags that a query selects, Kept all content that is kept.
	EachTag func(context.Context, audit.TagQuery) iter.Seq2[audit.Tag, error]
	Kept    func(context.Context) iter.Seq2[audit.Kept, error]

	Images  Images
	Carrier Carrier

	// Notifier tells others; Requeue has a sink told of entries of the log again.
	Notifier Notifier
	Alerts   audit.AlertStore
	Requeue  func(ctx context.Context, sink string, indexes []int64, now time.Time) error

	// Describe says in a line, and in full, what an entry of the log is about. FeedToken
	// lets readers have the feeds, as the parameter token; "" is no such token.
	Describe  func(index int64, leaf []byte, e audit.Event) (title, text string)
	FeedToken string

	// CheckPlatforms refuses what is no platform, ParseTime reads a date or a time.
	CheckPlatforms func([]string) error
	ParseTime      func(string) (time.Time, error)

	// Failed is told of an answer that could not be finished, and does not say why.
	Failed func(*http.Request, error)

	// ParsePolicy reads the policy of a configuration's text.
	ParsePolicy func(text string) (*audit.Policy, error)

	// Upstreams tells how the upstreams are doing, Warnings what a person should
	// look at although images are served.
	Upstreams func() []UpstreamStatus
	Warnings  func() []string

	// Offline tells that no upstream is ever asked.
	Offline bool

	// Registry tells how clients reach the registry, Disk how full the disk is.
	Registry RegistryStatus
	Disk     func() DiskStatus

	// Check asks every upstream, and for a ref if there is one, whether it answers.
	Check func(context.Context, *audit.Ref) []UpstreamCheck

	// CAs are the certificates of our own authorities, by name.
	CAs map[string][]byte
}

// A Handler answers on the admin address.
type Handler struct {
	o   Options
	mux *http.ServeMux
}

// New returns the handler that o describes.
func New(o Options) *Handler {
	h := &Handler{o: o, mux: http.NewServeMux()}
	h.mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]bool{"alive": true})
	})
	h.mux.HandleFunc("GET /readyz", h.ready)
	h.mux.Handle("GET /metrics", o.Metrics.handler())
	h.mux.HandleFunc("GET /{$}", h.index)
	h.mux.HandleFunc("GET /ca/{file}", h.ca)
	h.mux.HandleFunc("GET /log/checkpoint", h.checkpoint)
	h.mux.HandleFunc("GET /log/vkey", h.vkey)
	h.mux.HandleFunc("GET /log/proof/{index}", h.proof)
	h.mux.HandleFunc("GET /log/tile/", h.tile)
	h.mux.HandleFunc("GET /api/v1/status", api(h.status))
	h.mux.HandleFunc("GET /api/v1/tags", api(h.tags, "match", "held", "moved_since", "after", "limit"))
	h.mux.HandleFunc("GET /api/v1/tags/history", api(h.history, "ref", "after", "limit"))
	for _, action := range []string{audit.Approve, audit.Reject, audit.HoldAt, audit.Release} {
		h.mux.HandleFunc("POST /api/v1/tags/"+action, change(func(r *http.Request) (any, error) { return h.decide(r, action) }))
	}
	h.mux.HandleFunc("GET /api/v1/tags/asof", api(h.asof, "ref", "asof", "at"))
	h.mux.HandleFunc("POST /api/v1/tags/backfill", change(h.backfill))
	h.mux.HandleFunc("GET /api/v1/cache", api(h.store))
	h.mux.HandleFunc("GET /api/v1/cache/images", api(h.images, "complete", "platform", "verify", "match", "limit", "after"))
	h.mux.HandleFunc("GET /api/v1/cache/pins", api(h.pins, "reason", "limit", "after"))
	h.mux.HandleFunc("POST /api/v1/cache/pin", h.touch(o.Images.Pin))
	h.mux.HandleFunc("POST /api/v1/cache/unpin", h.touch(o.Images.Unpin))
	h.mux.HandleFunc("POST /api/v1/cache/remove", h.touch(o.Images.Remove))
	h.mux.HandleFunc("POST /api/v1/cache/scrub", progress(h.scrub))
	h.mux.HandleFunc("POST /api/v1/warm", progress(h.warm))
	h.mux.HandleFunc("POST /api/v1/export", h.export)
	h.mux.HandleFunc("POST /api/v1/import", h.imports)
	h.mux.HandleFunc("GET /api/v1/events", api(h.events, "ref", "type", "since", "until", "after", "limit", "order"))
	h.mux.HandleFunc("GET /api/v1/events/{index}", api(h.event))
	h.mux.HandleFunc("GET /api/v1/events/stream", h.stream)
	h.mux.HandleFunc("GET /api/v1/diff", api(h.diff, "old", "new", "ref", "platform"))
	h.mux.HandleFunc("GET /api/v1/exposure", api(h.exposure, "digest"))
	h.mux.HandleFunc("GET /api/v1/conditions", api(h.conditions, "limit"))
	h.mux.HandleFunc("POST /api/v1/policy/test", change(h.policyTest))
	h.mux.HandleFunc("POST /api/v1/notify/test", change(h.notifyTest))
	h.mux.HandleFunc("POST /api/v1/notify/preview", change(h.notifyPreview))
	h.mux.HandleFunc("POST /api/v1/notify/replay", change(h.notifyReplay))
	h.mux.HandleFunc("GET /api/v1/alerts", api(h.alerts, "all"))
	h.mux.HandleFunc("POST /api/v1/alerts/acknowledge", change(h.acknowledge))
	h.mux.HandleFunc("GET /api/v1/mutes", api(h.mutes))
	h.mux.HandleFunc("POST /api/v1/mutes", change(h.mute))
	h.mux.HandleFunc("POST /api/v1/mutes/remove", change(h.unmute))
	h.mux.HandleFunc("GET /feed.atom", h.feedAtom)
	h.mux.HandleFunc("GET /feed.json", h.feedJSON)
	h.mux.HandleFunc("POST /api/v1/upstreams/check", change(h.check))
	h.mux.HandleFunc("GET /api/v1/openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(openAPI)
	})
	h.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, &Error{http.StatusNotFound, "not_found", fmt.Sprintf("%s %.200q is not known here", r.Method, r.URL.Path)})
	})
	return h
}

// ServeHTTP lets through who may, and then routes.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if h.o.Token != "" && !public(r.URL.Path) && !h.mayReadFeed(r) {
		token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !ok || subtle.ConstantTimeCompare([]byte(token), []byte(h.o.Token)) != 1 {
			w.Header().Set("WWW-Authenticate", "Bearer")
			if isFeed(r.URL.Path) {
				writeError(w, &Error{http.StatusUnauthorized, "unauthorized", "a feed needs the token of admin.feed_token_file as its parameter token"})
				return
			}
			writeError(w, &Error{http.StatusUnauthorized, "unauthorized", "this needs the admin token as Authorization: Bearer; the client commands take it from TIDEMARK_TOKEN"})
			return
		}
	}
	if err := h.foreign(r); err != nil {
		writeError(w, err)
		return
	}
	h.mux.ServeHTTP(w, r)
}

// foreign refuses calls of the API that a web page of somebody else may have
// made: from another origin, or, where no token protects it, under a name that
// somebody may have pointed at this machine (DNS rebinding).
func (h *Handler) foreign(r *http.Request) error {
	if !strings.HasPrefix(r.URL.Path, "/api/") && !isFeed(r.URL.Path) {
		return nil
	}
	origin := r.Header.Get("Origin")
	if u, err := url.Parse(origin); origin != "" && (err != nil || u.Host != r.Host) || r.Header.Get("Sec-Fetch-Site") == "cross-site" {
		return &Error{http.StatusForbidden, "cross_origin", "this call comes from a web page of another origin"}
	}
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	if h.o.Token == "" && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return &Error{http.StatusForbidden, "wrong_host", fmt.Sprintf("without a token this address is called localhost or 127.0.0.1, not %.100q", host)}
	}
	return nil
}

func isFeed(path string) bool { return path == "/feed.atom" || path == "/feed.json" }

// mayReadFeed tells that a request is for a feed, with the token of feeds.
func (h *Handler) mayReadFeed(r *http.Request) bool {
	token := r.URL.Query().Get("token")
	return isFeed(r.URL.Path) && h.o.FeedToken != "" && subtle.ConstantTimeCompare([]byte(token), []byte(h.o.FeedToken)) == 1
}

// public tells the paths that need no token: health, and what proves the log.
func public(path string) bool {
	return path == "/healthz" || path == "/readyz" || strings.HasPrefix(path, "/log/") || strings.HasPrefix(path, "/ca/")
}

// An Error is an answer that refuses a call.
type Error struct {
	Status  int    `json:"-"`
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

func badRequest(format string, args ...any) *Error {
	return &Error{http.StatusBadRequest, "bad_request", fmt.Sprintf(format, args...)}
}

// api makes a handler of a function that returns what is to be encoded. Query
// parameters that it does not take are refused: a filter that is passed over
// would answer another question than the one that was asked.
func api(f func(*http.Request) (any, error), params ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		query, err := url.ParseQuery(r.URL.RawQuery)
		if err != nil {
			writeError(w, badRequest("the query is malformed: %v", err))
			return
		}
		for p := range query {
			if !slices.Contains(params, p) {
				writeError(w, badRequest("parameter %.100q is not known; this call takes: %s", p, strings.Join(params, ", ")))
				return
			}
		}
		v, err := f(r)
		if err != nil {
			writeError(w, err)
			return
		}
		writeJSON(w, http.StatusOK, v)
	}
}

// errNotJSON refuses what a web page could send without asking.
var errNotJSON = &Error{http.StatusUnsupportedMediaType, "not_json", "this call needs Content-Type: application/json"}

func isContent(r *http.Request, want string) bool {
	t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return err == nil && t == want
}

// change makes a handler of a function that changes something. No web page can
// call it: a form cannot send JSON, and a script of another origin may not.
func change(f func(*http.Request) (any, error)) http.HandlerFunc {
	call := api(f)
	return func(w http.ResponseWriter, r *http.Request) {
		if !isContent(r, "application/json") {
			writeError(w, errNotJSON)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		call(w, r)
	}
}

// maxBody bounds the body of a call in bytes.
const maxBody = 1 << 20

// body reads the body of a call. Keys that are not known are refused, like
// parameters.
func body(r *http.Request, v any) error {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return badRequest("the body is not what this call takes: %v", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return badRequest("the body goes on after what this call takes")
	}
	return nil
}

// asError is an error as the API answers it.
func asError(err error) *Error {
	var e *Error
	var conflict *audit.ConflictError
	switch {
	case errors.As(err, &e):
		return e
	case errors.As(err, &conflict):
		return &Error{http.StatusConflict, "conflict", err.Error()}
	case errors.Is(err, audit.ErrReason):
		return badRequest("reason: %v", err)
	case errors.Is(err, audit.ErrLedger):
		return &Error{http.StatusServiceUnavailable, "ledger_unwritable", err.Error()}
	case errors.Is(err, cache.ErrNotReady):
		return &Error{http.StatusServiceUnavailable, "not_ready", err.Error()}
	case errors.Is(err, cache.ErrTaken):
		return &Error{http.StatusConflict, "busy", err.Error()}
	case errors.Is(err, fs.ErrNotExist):
		return &Error{http.StatusNotFound, "not_found", err.Error()}
	}
	return &Error{http.StatusInternalServerError, "internal", err.Error()}
}

// refused is the body of an answer that is an error.
type refused struct {
	Error *Error `json:"error"`
}

func writeError(w http.ResponseWriter, err error) {
	e := asError(err)
	writeJSON(w, e.Status, refused{e})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false) // leaves are stored bytes, and stay what they are
	if err := enc.Encode(v); err != nil {
		panic("admin: answer cannot be encoded: " + err.Error())
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(body.Len()))
	w.WriteHeader(status)
	_, _ = w.Write(body.Bytes()) // a client that is gone needs no error
}

// ready says yes as long as images can be served.
func (h *Handler) ready(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, struct {
		Ready    bool     `json:"ready"`
		Warnings []string `json:"warnings"`
	}{true, nonNil(h.o.Warnings())})
}

func nonNil[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func (h *Handler) index(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintf(w, "tidemark %s, log %s\n\n/api/v1/status\n/api/v1/tags\n/api/v1/events\n/api/v1/openapi.json\n/metrics\n/readyz\n/log/checkpoint\n/log/vkey\n/feed.atom\n/feed.json\n", h.o.Version, h.o.Origin)
}

// caOff is what to configure to have an authority.
var caOff = map[string]string{"internal": "registry.tls.mode is not internal", "intercept": "registry.intercept.listen is not set"}

func (h *Handler) ca(w http.ResponseWriter, r *http.Request) {
	name, _ := strings.CutSuffix(r.PathValue("file"), ".crt")
	pem := h.o.CAs[name]
	if pem == nil {
		why, ok := caOff[name]
		if !ok {
			why = "the certificates are /ca/internal.crt and /ca/intercept.crt"
		}
		writeError(w, &Error{http.StatusNotFound, "not_found", why})
		return
	}
	w.Header().Set("Content-Type", "application/x-pem-file")
	_, _ = w.Write(pem)
}
