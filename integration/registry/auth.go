/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package registry

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"strings"
	"time"
)

const tokenPath = "/token"

type scheme int

const (
	basic scheme = iota
	token
)

type auth struct {
	scheme         scheme
	user, password string
	bearer         string // the one token that is issued
}

func newAuth(s scheme, user, password string) *auth {
	return &auth{scheme: s, user: user, password: password, bearer: rand.Text()}
}

func equal(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// withAuth lets only requests through that are authorized, and issues tokens.
func (r *Registry) withAuth(next http.Handler) http.Handler {
	a := r.auth
	if a == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch {
		case a.scheme == token && req.URL.Path == tokenPath:
			a.issue(w, req)
			return
		case a.scheme == basic && a.hasPassword(req):
			next.ServeHTTP(w, req)
			return
		case a.scheme == token && a.hasToken(req):
			next.ServeHTTP(w, req)
			return
		case a.scheme == basic:
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		case a.scheme == token:
			challenge := fmt.Sprintf("Bearer realm=%q,service=%q", r.URL()+tokenPath, r.Host())
			if repository, _, _ := split(req.URL.Path); repository != "" {
				challenge += fmt.Sprintf(",scope=%q", "repository:"+repository+":pull")
			}
			w.Header().Set("WWW-Authenticate", challenge)
		}
		writeError(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	})
}

func (a *auth) hasPassword(req *http.Request) bool {
	user, password, ok := req.BasicAuth()
	return ok && equal(user, a.user) && equal(password, a.password)
}

func (a *auth) hasToken(req *http.Request) bool {
	t, ok := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	return ok && equal(t, a.bearer)
}

// issue answers a token request in either of its two forms: GET with basic
// authentication, or POST with an OAuth 2.0 password grant.
func (a *auth) issue(w http.ResponseWriter, req *http.Request) {
	ok := a.hasPassword(req)
	if req.Method == http.MethodPost {
		ok = equal(req.PostFormValue("username"), a.user) && equal(req.PostFormValue("password"), a.password)
	}
	if !ok {
		writeError(w, http.StatusUnauthorized, "UNAUTHORIZED", "wrong user or password")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{ // the client will notice
		"token":        a.bearer,
		"access_token": a.bearer,
		"expires_in":   3600,
	})
}

// authority is a private certification authority with one certificate.
type authority struct {
	pem  []byte
	leaf tls.Certificate
}

// ProxiedName is a name that certificates are good for as well. It resolves to
// nothing: only a proxy finds the registry by it.
const ProxiedName = "registry.proxied.example"

func newAuthority(ip net.IP) (*authority, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "guest-pull test registry CA"},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2),
		Subject:      pkix.Name{CommonName: "guest-pull test registry"},
		NotBefore:    ca.NotBefore,
		NotAfter:     ca.NotAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:     []string{"localhost", ProxiedName},
		IPAddresses:  []net.IP{ip},
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		return nil, err
	}
	return &authority{
		pem:  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}),
		leaf: tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: key},
	}, nil
}
