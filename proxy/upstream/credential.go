package upstream

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
	"golang.org/x/sync/singleflight"
)

// A Credential is as whom an upstream is asked. The zero Credential is anonymous.
type Credential struct {
	Username, Password string

	// IdentityToken is exchanged for access tokens instead of a password (OAuth 2
	// refresh token; ACR's helper gives one).
	IdentityToken string
}

// Credentials find out as whom to ask. They may change with time. They are asked
// once for all who wait, and again when what they said is refused.
type Credentials func(context.Context) (Credential, error)

// Static are credentials that stay what they are.
func Static(username, password string) Credentials {
	return func(context.Context) (Credential, error) {
		return Credential{Username: username, Password: password}, nil
	}
}

// DockerConfig are the credentials for one of hosts, the first that has any, in a
// config.json of Docker: from the credential helper of the host, else from the
// credential store, else from the file itself. The file is read at each call.
// Hosts that it says nothing about are asked anonymously.
func DockerConfig(path string, hosts ...string) Credentials {
	return func(ctx context.Context) (Credential, error) {
		c, err := readDockerConfig(path)
		if err != nil {
			return Credential{}, fmt.Errorf("credentials of %s: %w", hosts[0], err)
		}
		for _, host := range hosts {
			cred, err := c.find(ctx, host)
			if err != nil {
				return Credential{}, fmt.Errorf("credentials of %s in %s: %w", host, path, err)
			}
			if cred != (Credential{}) {
				return cred, nil
			}
		}
		return Credential{}, nil
	}
}

// dockerConfig is what of config.json is about credentials.
type dockerConfig struct {
	Auths map[string]struct {
		Auth          string `json:"auth"` // base64 of user:password
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
	} `json:"auths"`
	CredsStore  string            `json:"credsStore"`
	CredHelpers map[string]string `json:"credHelpers"`
}

func readDockerConfig(path string) (*dockerConfig, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var c dockerConfig
	if json.Unmarshal(data, &c) != nil { // the error would quote what may be a secret
		return nil, fmt.Errorf("%s is no config.json of Docker", path)
	}
	return &c, nil
}

// find returns the credential of a host, zero if there is none.
func (c *dockerConfig) find(ctx context.Context, host string) (Credential, error) {
	server, inline := keyOf(maps.Keys(c.Auths), host) // helpers know it under the name that the login had
	if !inline {
		server = host
	}
	helper := c.CredsStore
	if key, ok := keyOf(maps.Keys(c.CredHelpers), host); ok {
		server, helper = key, c.CredHelpers[key]
	}
	if helper != "" {
		return askHelper(ctx, helper, server)
	}
	if !inline {
		return Credential{}, nil
	}
	a := c.Auths[server]
	cred := Credential{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken}
	if a.Auth != "" {
		plain, err := base64.StdEncoding.DecodeString(a.Auth)
		user, password, ok := strings.Cut(strings.TrimRight(string(plain), "\x00"), ":")
		if err != nil || !ok {
			return Credential{}, errors.New("auth is not the base64 of user:password")
		}
		cred.Username, cred.Password = user, password
	}
	return cred, nil
}

// keyOf is the key that is for a host: the host itself before addresses of it.
func keyOf(keys iter.Seq[string], host string) (key string, ok bool) {
	for _, k := range slices.Sorted(keys) {
		if k == host {
			return k, true
		}
		if !ok && hostname(k) == host {
			key, ok = k, true
		}
	}
	return key, ok
}

// hostname is the host of a key of config.json, which may be an address.
func hostname(key string) string {
	key = strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
	host, _, _ := strings.Cut(key, "/")
	return host
}

// helperName is what a credential helper may be called: it becomes a command.
var helperName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// askHelper runs docker-credential-NAME for a server. It ends with ctx.
func askHelper(ctx context.Context, name, server string) (Credential, error) {
	if !helperName.MatchString(name) {
		return Credential{}, fmt.Errorf("%.50q is not the name of a credential helper", name)
	}
	program := "docker-credential-" + name
	cmd := exec.CommandContext(ctx, program, credentials.ActionGet)
	cmd.WaitDelay = helperGrace
	h := &helper{Cmd: cmd}
	got, err := client.Get(func(...string) client.Program { return h }, server)
	switch {
	case credentials.IsErrCredentialsNotFound(err):
		return Credential{}, nil
	case err != nil && ctx.Err() != nil:
		return Credential{}, fmt.Errorf("%s: %w", program, context.Cause(ctx))
	case err != nil && h.err != nil:
		return Credential{}, fmt.Errorf("%s get: %w: %s", program, h.err, h.says(server))
	case err != nil:
		return Credential{}, fmt.Errorf("%s get: its answer is no credential", program)
	case got.Username == tokenUser:
		return Credential{IdentityToken: got.Secret}, nil
	}
	return Credential{Username: got.Username, Password: got.Secret}, nil
}

// helperGrace is for what a helper that is ended has started itself.
const helperGrace = 100 * time.Millisecond

// tokenUser is the user by which helpers say that the secret is an identity token.
const tokenUser = "<token>"

// helper is a client.Program that ends with its context.
type helper struct {
	*exec.Cmd
	out []byte // what it said
	err error  // of running it
}

func (h *helper) Input(r io.Reader) { h.Stdin = r }

func (h *helper) Output() ([]byte, error) {
	h.out, h.err = h.Cmd.Output()
	return h.out, h.err
}

// maybeSecret is what a helper says that is not to be repeated.
var maybeSecret = regexp.MustCompile(`(?i)^\s*\{|secret|passw|token|auth|\bkey\b|_key`)

// maxHelperWords bounds what is repeated of a helper in bytes.
const maxHelperWords = 300

// says is why a helper failed, in its own words unless these may be a secret.
func (h *helper) says(server string) string {
	words := strings.TrimSpace(string(h.out))
	switch {
	case words == "" || maybeSecret.MatchString(words):
		return "to see what it says: echo " + server + " | " + h.Path + " get"
	case len(words) > maxHelperWords:
		return words[:maxHelperWords] + "…"
	}
	return words
}

// A keyring keeps what credentials said, and asks them again when it is old or
// was refused.
type keyring struct {
	ask    Credentials // nil is anonymous
	flight singleflight.Group

	mu    sync.Mutex
	cred  Credential
	until time.Time
}

const (
	credentialFor     = 10 * time.Minute // shorter than any helper's password is valid
	credentialTimeout = 5 * time.Second  // of a helper
)

// get returns the credential to use now.
func (k *keyring) get(ctx context.Context) (Credential, error) {
	if k.ask == nil {
		return Credential{}, nil
	}
	k.mu.Lock()
	cred, fresh := k.cred, time.Now().Before(k.until)
	k.mu.Unlock()
	if fresh {
		return cred, nil
	}
	result := k.flight.DoChan("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), credentialTimeout)
		defer cancel()
		cred, err := k.ask(ctx)
		if err != nil {
			return Credential{}, err
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		k.cred, k.until = cred, time.Now().Add(credentialFor)
		return cred, nil
	})
	got, err := await(ctx, result)
	switch {
	case err != nil && ctx.Err() != nil:
		return Credential{}, err
	case err != nil:
		return Credential{}, &Error{Ours: true, Err: err}
	}
	return got.(Credential), nil
}

// drop forgets a credential that was refused.
func (k *keyring) drop(c Credential) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.cred == c {
		k.until = time.Time{}
	}
}
