package upstream

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// ErrOffline is why nothing was asked: the configuration says to ask nobody.
var ErrOffline = errors.New("this server is offline and asks no upstream")

// An Error is why an upstream gave nothing that can be used. It keeps apart
// what upstream said (Status), what it sent instead of an answer (Nonsense),
// and its silence (neither).
type Error struct {
	Upstream   string
	Op         string        // method and path
	Status     int           // of upstream's answer, 0 if there was none or it could not be believed
	Message    string        // upstream's own words, shortened
	RetryAfter time.Duration // as upstream asked for it with 429 or 503, 0 if it did not
	Nonsense   bool          // upstream answered, but with something that no registry should send
	Ours       bool          // upstream was not asked: there is trouble with the configured credentials
	Remembered bool          // the answer is one that upstream gave before, to somebody else
	Err        error         // the cause, when it is not upstream's status

	// Caller is who asked, as Upstream.Caller has it. What upstream asks of that client is in Challenge, as
	// WWW-Authenticate had it.
	Caller    string
	Challenge []string
}

func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s: ", e.Upstream, e.Op)
	switch {
	case e.Status != 0:
		fmt.Fprintf(&b, "%d %s", e.Status, http.StatusText(e.Status))
		if e.Message != "" {
			fmt.Fprintf(&b, ": %s", e.Message)
		}
		if e.Err != nil {
			fmt.Fprintf(&b, ": %v", e.Err)
		}
	case e.Err != nil:
		b.WriteString(e.Err.Error())
	default:
		b.WriteString(e.Message)
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// Condition says what the error tells about upstream's condition: that it lets
// us see things no longer, that it is in trouble, or nothing.
func (e *Error) Condition() string {
	switch {
	case errors.Is(e.Err, ErrOffline), e.Remembered, e.Caller != "" && e.isRefusal():
		return ""
	case e.Status == http.StatusUnauthorized, e.Status == http.StatusForbidden:
		return "upstream.access_lost"
	case e.Status == 0 && !e.Nonsense && !e.Ours, e.Status == http.StatusTooManyRequests, e.Status >= http.StatusInternalServerError:
		return "upstream.degraded"
	}
	return ""
}

// Wait is for how long upstream asked not to be asked, 0 if it did not.
func (e *Error) Wait() time.Duration { return e.RetryAfter }

// Is makes upstream's 404 the fs.ErrNotExist that every room understands.
func (e *Error) Is(target error) bool {
	return target == fs.ErrNotExist && e.Status == http.StatusNotFound
}

// isRefusal tells what is said to one who asks, and not of upstream's condition.
func (e *Error) isRefusal() bool {
	return e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden || e.Status == http.StatusTooManyRequests
}

// worthAnotherEndpoint tells trouble of one endpoint from an answer.
func (e *Error) worthAnotherEndpoint() bool {
	return !e.Nonsense && !e.Ours && (e.Status == 0 || e.Status == http.StatusTooManyRequests || e.Status >= 500)
}

// nonsense reports an answer that cannot be believed.
func (u *Upstream) nonsense(req *http.Request, err error) *Error {
	return &Error{Upstream: u.name, Op: req.Method + " " + req.URL.Path, Nonsense: true, Caller: u.caller, Err: err}
}

// maxErrorBody bounds what is read of an error's body in bytes.
const maxErrorBody = 64 << 10

// refusal reads a response that is neither 200 nor 206.
func (u *Upstream) refusal(resp *http.Response, op string) *Error {
	e := &Error{Upstream: u.name, Op: op, Status: resp.StatusCode, RetryAfter: retryAfter(resp.Header.Get("Retry-After")), Caller: u.caller}
	if resp.StatusCode < 400 {
		e.Status, e.Nonsense, e.Err = 0, true, fmt.Errorf("unexpected status %s", resp.Status)
		return e
	}
	if u.caller != "" && resp.StatusCode == http.StatusUnauthorized {
		challenge, err := u.auth.relayed(resp)
		if err != nil {
			var told *Error
			if errors.As(err, &told) {
				err = told.Err
			}
			e.Status, e.Nonsense, e.Err = 0, true, err
			return e
		}
		e.Challenge = challenge
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if err != nil {
		return e // the status is what counts
	}
	var list struct {
		Errors []struct{ Code, Message string } `json:"errors"`
	}
	if json.Unmarshal(body, &list) == nil && len(list.Errors) > 0 {
		e.Message = strings.TrimSpace(list.Errors[0].Code + " " + list.Errors[0].Message)
		if len(e.Message) > 300 {
			e.Message = e.Message[:300] + "…"
		}
	}
	return e
}

// maxRetryAfter bounds how long an upstream may silence us at once.
const maxRetryAfter = time.Hour

// retryAfter reads seconds or a date (RFC 9110, section 10.2.3).
func retryAfter(s string) time.Duration {
	if s == "" {
		return 0
	}
	if strings.Trim(s, "0123456789") == "" {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n > int64(maxRetryAfter/time.Second) {
			return maxRetryAfter
		}
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(s); err == nil {
		return min(max(0, time.Until(t)), maxRetryAfter)
	}
	return 0
}
