//go:build tools

// Package servers pins etcd, kube-apiserver and kubectl, which tests/controlplane builds from their own modules.
package servers

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kubectl"
)
