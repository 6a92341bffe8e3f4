package upstream

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"net/http"
	"strings"
	"unicode"
)

// As is the upstream asked with the rights of a client that sends this
// Authorization header, or none. Nothing of the configuration's credentials is
// used, and a refusal carries the challenge that the client is to answer.
func (u *Upstream) As(authorization string) *Upstream {
	return &Upstream{
		registry: u.registry, caller: u.callers.name(authorization),
		client: &http.Client{Transport: clientTransport{u.auth, authorization}, CheckRedirect: u.redirect},
	}
}

// Caller is whose rights are used: "" for those of the configuration, else a name
// that is the same for the same Authorization as long as this process lives, and
// tells nothing about it.
func (u *Upstream) Caller() string { return u.caller }

// callers name clients by a hash with a key that nobody else has.
type callers struct{ key [32]byte }

func newCallers() (c callers) {
	_, _ = rand.Read(c.key[:]) // never fails
	return c
}

func (c *callers) name(authorization string) string {
	m := hmac.New(sha256.New, c.key[:])
	m.Write([]byte(authorization))
	return string(m.Sum(nil))
}

// isOthersLimit tells a rate limit that was told to somebody else than this caller,
// whose own may be another.
func (u *Upstream) isOthersLimit(e *Error) bool {
	return u.caller != "" && e.Status == http.StatusTooManyRequests
}

// A clientTransport sends a client's own Authorization to the endpoints of an
// upstream, and nowhere else.
type clientTransport struct {
	auth          *authTransport
	authorization string
}

func (t clientTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if t.auth.endpoint(req.URL) == nil {
		return t.auth.foreign.RoundTrip(req)
	}
	if t.authorization != "" {
		req = req.Clone(req.Context())
		req.Header.Set("Authorization", t.authorization)
	}
	return t.auth.own.RoundTrip(req)
}

// relayed is the challenge of a response as it may be told to a client, who will
// send its password to the realm. Only what was understood is told.
func (t *authTransport) relayed(resp *http.Response) ([]string, error) {
	if t.endpoint(resp.Request.URL) == nil {
		return nil, errors.New("a host to which upstream redirected asks for credentials")
	}
	bearer, basic := parseChallenges(resp.Header.Values("Www-Authenticate"))
	var challenges []string
	if bearer != nil {
		if _, err := t.checkRealm(resp.Request.URL, bearer["realm"]); err != nil {
			return nil, err
		}
		var params []string
		for _, k := range []string{"realm", "service", "scope", "error"} {
			v := bearer[k]
			if strings.ContainsAny(v, `"\\`) || strings.ContainsFunc(v, unicode.IsControl) {
				return nil, &Error{Nonsense: true, Err: errors.New("a challenge that can be read in more than one way")}
			}
			if v != "" {
				params = append(params, k+`="`+v+`"`)
			}
		}
		challenges = append(challenges, "Bearer "+strings.Join(params, ","))
	}
	if basic {
		challenges = append(challenges, `Basic realm="`+resp.Request.URL.Host+`"`)
	}
	return challenges, nil
}
