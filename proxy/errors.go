package proxy

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"tidemark/audit"
	"tidemark/cache"
	"tidemark/proxy/oci"
	"tidemark/proxy/route"
	"tidemark/proxy/upstream"
)

// refuse answers a pull that failed before anything was sent. It is where the
// errors of all rooms become codes of the specification.
func refuse(w http.ResponseWriter, p Pull) {
	head := w.Header()
	for _, k := range []string{"Cache-Control", "Cache-Status", "Content-Length", "Docker-Content-Digest", "Etag"} {
		head.Del(k)
	}
	e := toOCI(p)
	var ue *upstream.Error
	if errors.As(p.Err, &ue) && ue.RetryAfter > 0 && (e.Status == http.StatusTooManyRequests || e.Status == http.StatusServiceUnavailable) {
		head.Set("Retry-After", strconv.Itoa(int((ue.RetryAfter+time.Second-1)/time.Second)))
	}
	if ue != nil && e.Status == http.StatusUnauthorized {
		head["Www-Authenticate"] = ue.Challenge
	}
	e.Write(w)
}

func toOCI(p Pull) *oci.Error {
	var (
		oe *oci.Error
		re *route.ErrUnknown
		ue *upstream.Error
		pe *audit.PastError
	)
	err := p.Err
	switch {
	case errors.Is(err, cache.ErrNotManifest):
		return &oci.Error{Status: http.StatusNotFound, Code: oci.ManifestUnknown, Message: "there is content of this digest, but it is no manifest"}
	case errors.As(err, &oe):
		return oe
	case errors.As(err, &re):
		return &oci.Error{Status: http.StatusNotFound, Code: oci.NameUnknown, Message: re.Error()}
	case errors.Is(err, audit.ErrDenied), errors.Is(err, audit.ErrTooNew), errors.Is(err, audit.ErrDeleted):
		return &oci.Error{Status: http.StatusNotFound, Code: oci.ManifestUnknown, Message: err.Error(), Detail: detail{Upstream: p.Upstream, Policy: true}}
	case errors.As(err, &pe):
		return &oci.Error{Status: http.StatusNotFound, Code: oci.ManifestUnknown, Message: err.Error(), Detail: detail{Upstream: p.Upstream, Earliest: pe.Earliest}}
	case errors.Is(err, upstream.ErrOffline):
		return offline(p)
	case errors.Is(err, audit.ErrLedger):
		return &oci.Error{Status: http.StatusServiceUnavailable, Code: oci.Unavailable, Message: "this tag was never recorded here, and the ledger cannot be written now: " + err.Error()}
	case errors.Is(err, cache.ErrMismatch):
		return &oci.Error{Status: http.StatusBadGateway, Code: oci.Unknown, Message: "upstream sent content that does not match its digest: " + err.Error(), Detail: detail{Upstream: p.Upstream}}
	case errors.Is(err, cache.ErrClosing):
		return &oci.Error{Status: http.StatusServiceUnavailable, Code: oci.Unavailable, Message: "this server is shutting down"}
	case errors.As(err, &ue):
		return upstreamError(p, ue)
	case errors.Is(err, context.DeadlineExceeded):
		return &oci.Error{Status: http.StatusGatewayTimeout, Code: oci.Unavailable, Message: "upstream did not answer in time: " + err.Error(), Detail: detail{Upstream: p.Upstream}}
	}
	return &oci.Error{Status: http.StatusInternalServerError, Code: oci.Unknown, Message: "tidemark itself failed; its log says why"}
}

// detail says which upstream an error is about, and what its own status was.
type detail struct {
	Upstream string `json:"upstream"`
	Status   int    `json:"status,omitempty"`
	Policy   bool   `json:"policy,omitempty"`  // it is this server's policy that refuses
	Offline  bool   `json:"offline,omitempty"` // it is not here, and nobody may be asked

	Earliest *time.Time `json:"earliest,omitempty"` // from when on something is known
}

// unknown is the code for what there is not, by what was asked for.
var unknown = map[oci.Kind]string{oci.Manifest: oci.ManifestUnknown, oci.Blob: oci.BlobUnknown, oci.TagList: oci.NameUnknown, oci.Referrers: oci.ManifestUnknown, oci.Push: oci.NameUnknown, oci.TagHistory: oci.ManifestUnknown, oci.OCITagHistory: oci.ManifestUnknown}

// offline tells that something is not here and will not be asked for.
func offline(p Pull) *oci.Error {
	return &oci.Error{Status: http.StatusNotFound, Code: unknown[p.Kind], Message: "it is not here, and this server is offline: it asks no upstream", Detail: detail{Upstream: p.Upstream, Offline: true}}
}

// upstreamError tells upstream's trouble as what it is.
func upstreamError(p Pull, ue *upstream.Error) *oci.Error {
	says := ue.Error()
	if ue.Ours { // what a helper said is not for clients
		says = "the credentials that are configured for " + p.Upstream + " could not be had; tidemark's log says why"
	}
	e := &oci.Error{Message: says, Detail: detail{Upstream: p.Upstream, Status: ue.Status}}
	switch {
	case ue.Status == http.StatusUnauthorized:
		e.Status, e.Code = http.StatusUnauthorized, oci.Unauthorized
	case ue.Status == http.StatusForbidden:
		e.Status, e.Code = http.StatusForbidden, oci.Denied
	case ue.Status == http.StatusNotFound:
		e.Status, e.Code = http.StatusNotFound, unknown[p.Kind]
	case ue.Status == http.StatusTooManyRequests:
		e.Status, e.Code = http.StatusTooManyRequests, oci.TooManyRequests
	case ue.Status != 0, ue.Nonsense, ue.Ours:
		e.Status, e.Code = http.StatusBadGateway, oci.Unknown
	default:
		e.Status, e.Code = http.StatusGatewayTimeout, oci.Unavailable
	}
	return e
}

// silent tells whether upstream gave no answer that concerns the request: it
// did not answer, or said that it cannot now.
func silent(err error) bool {
	var ue *upstream.Error
	if !errors.As(err, &ue) {
		return errors.Is(err, context.DeadlineExceeded)
	}
	return ue.Nonsense || ue.Ours || ue.Status == 0 || ue.Status == http.StatusTooManyRequests || ue.Status >= 500
}
