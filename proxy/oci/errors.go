package oci

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
)

// The error codes of distribution-spec, "Error Codes", as far as pulls use them.
const (
	BlobUnknown       = "BLOB_UNKNOWN"
	BlobUploadUnknown = "BLOB_UPLOAD_UNKNOWN"
	Denied            = "DENIED"
	DigestInvalid     = "DIGEST_INVALID"
	ManifestUnknown   = "MANIFEST_UNKNOWN"
	NameInvalid       = "NAME_INVALID"
	NameUnknown       = "NAME_UNKNOWN"
	TagInvalid        = "TAG_INVALID"
	TooManyRequests   = "TOOMANYREQUESTS"
	Unauthorized      = "UNAUTHORIZED"
	Unavailable       = "UNAVAILABLE"
	Unsupported       = "UNSUPPORTED"
	Unknown           = "UNKNOWN"
)

// An Error is an answer that refuses a request. Message is for a person: what
// was attempted, and what to do. Detail is encoded as JSON beside it.
type Error struct {
	Status  int // of HTTP
	Code    string
	Message string
	Detail  any
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s", e.Code, e.Message) }

// Write answers with e as distribution-spec asks for it. Headers that belong
// to the error, such as Retry-After, are set by the caller before.
func (e *Error) Write(w http.ResponseWriter) {
	type item struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Detail  any    `json:"detail,omitempty"`
	}
	body, err := json.Marshal(struct {
		Errors []item `json:"errors"`
	}{[]item{{e.Code, e.Message, e.Detail}}})
	if err != nil {
		panic(fmt.Sprintf("oci: detail of %s cannot be encoded: %v", e.Code, err))
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(e.Status)
	_, _ = w.Write(body) // a client that is gone needs no error
}

func notFound(path string) *Error {
	return &Error{http.StatusNotFound, Unsupported, fmt.Sprintf("%.300q is not a route of the distribution API that this server answers", path), nil}
}

func notAllowed(method, path string) *Error {
	return &Error{http.StatusMethodNotAllowed, Unsupported, fmt.Sprintf("%s is not allowed on %s", method, path), nil}
}
